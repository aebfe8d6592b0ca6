"""The GlobalScheduler actor and the router that carries its choices out."""
