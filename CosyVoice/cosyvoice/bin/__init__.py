"""Programs: train a part of the model, average its checkpoints, speak, export."""
