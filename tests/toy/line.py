"""The model as MLflow stores it: this file, and the line's two numbers."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class Line(PythonModel):
    """A line through points."""

    def load_context(self, context: Any) -> None:
        """Read slope and offset."""
        self.line = json.loads(Path(context.artifacts["line"]).read_text())

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.Series:
        """Give y for each x."""
        return self.line["slope"] * model_input["x"] + self.line["offset"]


set_model(Line())
