"""experiments/cluster/kubernetes.yaml: its parts fit each other, the program, and the schema.

No cluster is at hand: what the pods do was tested as processes, under Slurm and by themselves.
"""

import re

import pytest
import yaml

from alexnet_jax.errors import UsageError
from alexnet_jax.parallel import distributed
from configs import alexnet


@pytest.fixture(scope='module')
def parts(repository):
    text = (repository / 'experiments/cluster/kubernetes.yaml').read_text()
    filled = re.sub('<[a-z]+>', 'filled', text)  # what the user fills in
    return {part['kind']: part for part in yaml.safe_load_all(filled)}


@pytest.fixture(scope='module')
def pod(parts):
    return parts['Job']['spec']['template']['spec']


def test_each_pod_finds_its_index(parts, pod):
    """Names as Kubernetes makes them: <job>-<index>.<service>; the index is in the environment."""
    job, service = parts['Job'], parts['Service']
    assert service['spec']['clusterIP'] == 'None'
    assert service['spec']['selector'] == {'job-name': job['metadata']['name']}
    assert pod['subdomain'] == service['metadata']['name']
    assert job['spec']['completionMode'] == 'Indexed'
    [container] = pod['containers']
    environ = {variable['name']: variable['value'] for variable in container['env']}
    count = job['spec']['completions']
    assert job['spec']['parallelism'] == count
    for index in range(count):
        info = distributed.detect(environ | {'JOB_COMPLETION_INDEX': str(index)})
        assert info is not None
        assert (info.process, info.processes) == (index, count)
        host, port = str(info.coordinator).rsplit(':', 1)
        assert host == f'{job["metadata"]["name"]}-0.{service["metadata"]["name"]}'
        assert 1024 < int(port) < 2**16


def test_all_but_nonsense_is_started_again(parts, pod):
    job = parts['Job']['spec']
    nonsense, disrupted = job['podFailurePolicy']['rules']
    assert nonsense['action'] == 'FailJob'
    assert nonsense['onExitCodes']['values'] == [UsageError.exit_code]
    assert nonsense['onExitCodes']['containerName'] == pod['containers'][0]['name']
    assert disrupted['action'] == 'Ignore'
    assert pod['restartPolicy'] == 'Never'  # podFailurePolicy wants it
    assert job['backoffLimit'] >= 10 * job['completions']  # one failure takes all pods with it


def test_the_command_is_one_that_main_takes(pod, repository):
    [container] = pod['containers']
    assert container['command'] == ['python', 'main.py']
    words = dict(word.split('=', 1) for word in container['args'])
    name, _, scale = words.pop('--config').partition(':')
    assert name == 'configs/alexnet.py'
    assert (repository / name).exists()
    config = alexnet.get_config(scale)
    del words['--workdir']
    known = config.to_dict()
    for word in words:
        keys = word.removeprefix('--config.').split('.')
        value = known
        for key in keys:
            value = value[key]  # or there is no such key
    folders = [words['--config.data.data_dir']]
    mounts = [mount['mountPath'] for mount in container['volumeMounts']]
    assert all(any(folder.startswith(mount) for mount in mounts) for folder in folders)
    volumes = {volume['name'] for volume in pod['volumes']}
    assert {mount['name'] for mount in container['volumeMounts']} == volumes


@pytest.mark.parametrize('version', ['1.29', '1.37'])
def test_the_published_schema(parts, version):
    validator = pytest.importorskip(
        'kubernetes_validate', reason='the schemas are 100 MB, for `make test-cluster` alone'
    )
    for part in parts.values():
        validator.validate(part, version, strict=True)
    misspelt = parts['Job'] | {'spec': parts['Job']['spec'] | {'backofLimit': 1}}
    with pytest.raises(validator.ValidationError):
        validator.validate(misspelt, version, strict=True)
