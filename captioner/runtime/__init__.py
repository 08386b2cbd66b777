"""What runs underneath: devices, Ray, progress, signals, memory."""
