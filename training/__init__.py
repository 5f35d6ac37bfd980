"""From recordings to a trained model. Run from the checkout: `python -m training.NAME`."""
