"""Say what a study is: its question, its rows and which reads which, read from YAML. ``kd.sweeps.study`` runs one."""
