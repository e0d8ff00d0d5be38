"""The study: which runs, where they are trained, what they say, and the proof. Only the recipe decides their bytes."""
