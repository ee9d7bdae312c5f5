"""Many adapters behind one endpoint: an engine that answers requests for all of them in one batch (`engine`), and the
HTTP server around it."""
