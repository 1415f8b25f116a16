"""What trains when: schedules and policies of freezing."""
