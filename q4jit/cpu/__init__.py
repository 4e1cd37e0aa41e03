"""The CPU: schedules, LLVM text and launches."""
