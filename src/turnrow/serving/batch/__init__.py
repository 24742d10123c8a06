"""Many adapters in one step: slots on the device, and what lies in them applied to the tokens of a packed row."""
