"""SSMI's memory, the places in a frozen model where it goes, and LoRA with visual tokens in front, beside it."""
