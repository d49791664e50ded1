"""Preferences: what people and judges said about responses, how it is kept, and who is asked about what."""
