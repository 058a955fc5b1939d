"""Jobs in YAML files: the settings of one job, files of many jobs, running them one after another, and their overview."""
