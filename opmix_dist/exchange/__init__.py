"""The run directory, where trainers and pool meet: paths, atomic writes, schemas, statuses."""
