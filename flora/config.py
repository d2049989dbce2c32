"""Settings: flag > `FLORA_*` > `flora.toml` in the working folder > the user's file > default.

The CLI reads them once and hands values down; no other room looks at the environment.
"""

from functools import cache
from pathlib import Path
from tomllib import TOMLDecodeError, loads

import platformdirs
from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from flora.errors import UsageError

USER_FILE = Path(platformdirs.user_config_dir("flora")) / "flora.toml"
PROJECT_FILE = Path("flora.toml")


class Settings(BaseSettings):
    """What Flora can be told without flags. `FLORA_HOME=/data/flora`, or `home = "/data/flora"` in a flora.toml."""

    model_config = SettingsConfigDict(env_prefix="FLORA_", extra="ignore")

    home: Path = Field(Path(platformdirs.user_data_dir("flora")), description="the folder of everything Flora keeps")
    registry_url: str | None = Field(
        None,
        description="another registry: a folder, sqlite:///… or postgresql://…?blobs=FOLDER (default: home/registry)",
    )
    debug: bool = Field(False, description="show tracebacks")

    @property
    def registry_dir(self) -> Path:
        return self.home / "registry"

    @property
    def cache_dir(self) -> Path:
        return self.home / "cache"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
            TomlConfigSettingsSource(settings_cls, toml_file=PROJECT_FILE),
            TomlConfigSettingsSource(settings_cls, toml_file=USER_FILE),
        )


@cache
def settings() -> Settings:
    """The settings of this process, read once. Raises UsageError if a variable or a file does not fit."""
    try:
        return Settings()
    except (ValidationError, TOMLDecodeError) as error:
        raise UsageError(
            "the settings do not fit",
            cause=str(error),
            fix=f"look at the FLORA_* variables, {PROJECT_FILE} in this folder and {USER_FILE}",
        ) from error


def unknown_keys(file: Path) -> list[str]:
    """Keys of a settings file that nothing reads; none where there is no such file, or it is no TOML."""
    try:
        return sorted(set(loads(file.read_text(encoding="utf-8"))) - set(Settings.model_fields))
    except (OSError, UnicodeDecodeError, TOMLDecodeError):
        return []
