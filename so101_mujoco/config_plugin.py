"""The plug-in's flags. LeRobot looks for the class of a config of `config_plugin` in `plugin`, and without "Config"."""

from dataclasses import dataclass, field

from lerobot.robots import RobotConfig
from lerobot.teleoperators import TeleoperatorConfig


@RobotConfig.register_subclass("so101_mujoco")
@dataclass(kw_only=True)
class SO101MujocoConfig(RobotConfig):
    # Of the first episode, which draws the arm and where the sheet lies
    seed: int = 0
    # Whose frames are observed: top, side or wrist; "" for none
    camera: str = "top"
    # Observe where the sheet is seen, which act.py and diffusion_policy.py need
    sheet: bool = True
    # Show the arm in MuJoCo's viewer, 30 times a second at most
    viewer: bool = False
    # Of what every episode draws, at one value (SI units, steps), by name in env_paper_square.py's DRAWS: '{delay: 2}'
    fixed: dict[str, float] = field(default_factory=dict)


@TeleoperatorConfig.register_subclass("so101_keyboard")
@dataclass(kw_only=True)
class SO101KeyboardConfig(TeleoperatorConfig):
    pass
