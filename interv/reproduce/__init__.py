"""Running specs that have a reference, and saying which of their claims hold."""
