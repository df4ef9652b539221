"""Golden cases of what is no released model: probes, labels, protocols, training steps; one file per family."""
