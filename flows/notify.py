"""Word of how runs end: a Prefect automation that calls a webhook."""

from datetime import timedelta
from typing import cast
from uuid import UUID

from prefect.automations import AutomationCore, CallWebhook, EventTrigger, Posture
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.types import SecretDict
from prefect.utilities.slugify import slugify
from pydantic import SecretStr

from poemerge.errors import SettingError

# Prefect's names. Whoever cancels a run knows it, and of one that was up to date there is no word.
ENDS = ("Completed", "Failed", "Crashed", "TimedOut")
# `text` is what Slack, Mattermost and their like show.
PAYLOAD = """\
{% set run = event.resource["prefect.resource.name"] -%}
{% set end = event.resource["prefect.state-name"] -%}
{
  "text": {{ (flow.name ~ "/" ~ deployment.name ~ ", run " ~ run ~ ": " ~ end) | tojson }},
  "deployment": {{ deployment.name | tojson }},
  "run": {{ run | tojson }},
  "state": {{ end | tojson }},
  "message": {{ event.resource["prefect.state-message"] | tojson }},
  "url": {{ flow_run | ui_url | tojson }}
}
"""


def tell_of_ends(client: SyncPrefectClient, deployment: str, name: str, url: str) -> None:
    """See that `url` gets a POST whenever a run of the deployment ends.

    The server calls it and keeps it encrypted, since such addresses are secrets themselves.

    Args:
        client: of the server.
        deployment: id.
        name: of the deployment; there is one webhook for each, and a new one replaces it.
        url: http or https.

    Raises:
        SettingError: `url` is no web address.
    """
    if not url.startswith(("http://", "https://")):
        raise SettingError("--notify takes the http:// or https:// address of a webhook.")
    label = f"poemerge: ends of {name}"
    hook = Webhook(url=SecretStr(url), headers=SecretDict({"Content-Type": "application/json"}))
    block = cast("UUID", hook.save(slugify(f"poemerge {name}"), overwrite=True))
    trigger = EventTrigger(
        expect={f"prefect.flow-run.{end}" for end in ENDS},
        match_related={"prefect.resource.id": f"prefect.deployment.{deployment}"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )
    action = CallWebhook(block_document_id=block, payload=PAYLOAD)
    automation = AutomationCore(name=label, trigger=trigger, actions=[action])
    known = client.read_automations_by_name(label)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)
