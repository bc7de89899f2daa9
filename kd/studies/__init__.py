"""What a study is: its question, its rows and who reads whom, read from YAML. ``kd.sweeps.study`` runs one."""
