"""job.yaml and party.yaml -> a frozen, checked job."""
