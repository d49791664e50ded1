"""The history of the preference store's tables; `reward_service.preferences.database` runs it."""
