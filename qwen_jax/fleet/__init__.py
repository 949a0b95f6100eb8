"""Many workers at one look."""
