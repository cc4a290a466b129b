"""Where files are kept: durable writes, and storage errors that say what to do."""
