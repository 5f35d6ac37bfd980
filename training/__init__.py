"""From recordings to a trained model: `python -m voxlm_training.NAME`."""
