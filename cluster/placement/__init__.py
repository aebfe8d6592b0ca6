"""The GlobalScheduler, and the router of Serve that carries out its choices."""
