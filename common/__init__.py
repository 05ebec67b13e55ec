"""What the stages share and no reader of the paper came for."""
