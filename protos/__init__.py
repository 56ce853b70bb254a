"""The wire contract: `tandem/v1/*.proto` and the stubs that `scripts/make_protos` writes."""
