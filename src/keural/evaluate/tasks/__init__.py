"""Tasks as data: what is asked, of which set, how it is judged; one YAML file each."""
