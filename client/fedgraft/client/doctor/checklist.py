"""The checks of a site before it takes part: each says what it found, and how to mend it.

The checks run in the order in which a round needs what they check. A check that fails or breaks
never stops the others. A check that needs a failed check is skipped. Nothing is changed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedgraft.client.doctor import bandwidth, device, job_data, local, network
from fedgraft.client.doctor.local import FAIL, SKIPPED, Finding, Patient
from fedgraft.common.errors import FedgraftError

__all__ = ["CHECKS", "Check", "Finding", "examine"]


@dataclass(frozen=True)
class Check:
    """One check; ``look`` is called only if none of ``needs`` failed or was skipped."""

    name: str
    look: Callable[[Patient], Finding]
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("site.toml", local.site_file),
    Check("policy", local.policy, ("site.toml",)),
    Check("membership", local.membership, ("site.toml",)),
    Check("certificate", local.certificate, ("membership",)),
    Check("keys", local.keys, ("membership",)),
    Check("disk", local.disk, ("site.toml",)),
    Check("name", network.name, ("membership",)),
    Check("tcp", network.tcp, ("name",)),
    Check("tls", network.tls, ("tcp",)),
    Check("coordinator", network.coordinator, ("tls", "certificate")),
    Check("clock", network.clock, ("coordinator",)),
    Check("latency", network.latency, ("coordinator",)),
    Check("rate", bandwidth.rate, ("coordinator", "policy")),
    Check("proxies", network.proxies),
    Check("device", device.device, ("site.toml",)),
    Check("training", device.training, ("device",)),
    Check("data", local.data, ("site.toml",)),
    Check("job", job_data.job_data, ("site.toml",)),
    Check("refusals", job_data.refusals, ("site.toml",)),
    Check("roster", local.roster, ("membership",)),
    Check("rules", local.rules, ("policy",)),
    Check("audit", local.audit, ("site.toml",)),
)


def examine(path: Path, checks: tuple[Check, ...] = CHECKS, *, job: str = "") -> Iterator[Finding]:
    """Yield the findings about the site whose ``site.toml`` is at ``path``, as they are made.

    ``job`` names a job to try the site's data with: its file, or the id of its run.
    """
    patient, missing = Patient(path, job), set[str]()
    for check in checks:
        lacking = [need for need in check.needs if need in missing]
        if lacking:
            missing.add(check.name)
            yield Finding(check.name, SKIPPED, f"needs {lacking[0]}")
            continue
        finding = _tried(check, patient)
        if finding.state == FAIL:
            missing.add(check.name)
        yield finding


def _tried(check: Check, patient: Patient) -> Finding:
    try:
        return check.look(patient)
    except FedgraftError as error:
        return Finding(check.name, FAIL, str(error), error.hint)
    except Exception as error:  # its text may hold anything, so only its class is shown
        return Finding(check.name, FAIL, f"could not be checked ({type(error).__name__})")
