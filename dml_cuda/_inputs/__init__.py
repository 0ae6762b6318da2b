"""What users hand over: checks, batches, indices and options."""
