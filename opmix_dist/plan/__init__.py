"""What a run will need, before any device is paid for."""
