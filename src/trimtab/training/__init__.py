"""The run: model, plan and data in; adapter, metrics, predictions and report out."""
