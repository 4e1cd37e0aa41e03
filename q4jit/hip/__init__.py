"""GPUs: schedules, HIP text and launches."""
