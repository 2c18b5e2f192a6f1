"""robomimic's tasks in robosuite."""
