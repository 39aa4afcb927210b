"""rlvr's objectives inside other trainers. Each module imports its trainer only when it is used."""
