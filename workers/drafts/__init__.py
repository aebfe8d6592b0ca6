"""The worker's side of drafting: the protocol and its client."""
