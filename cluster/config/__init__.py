"""The app's config: the schema, and the reader of Serve config files."""
