"""From a trained model to a Hub repository folder: `python -m voxlm_hub_export.NAME`."""
