"""What `ssmzoo.models.detector` needs of its own."""
