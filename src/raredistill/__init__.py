"""Does a teacher help the rare class? Evidence from patient-grouped studies of knowledge distillation."""
