"""The command `tandem`: its commands, its health check and its demo."""
