"""How far a job is and where its time goes, recorded and shown."""
