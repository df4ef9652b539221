"""Functions model -> model: what a trained model may become."""
