"""The queryable history: a projector that folds the log into DuckDB, and the services that answer questions from it."""
