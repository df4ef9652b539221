"""Pictures with a class for every pixel, or with boxes and masks of objects; knows nothing of models."""
