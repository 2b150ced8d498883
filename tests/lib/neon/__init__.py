"""Run the compiled passes of 64-bit ARM in an emulator."""
