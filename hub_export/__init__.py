"""From a trained model to a Hub repository folder. Run from the checkout: `python -m hub_export.NAME`."""
