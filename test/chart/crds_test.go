package chart

import (
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	commonutil "helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/engine"
)

// Classes are of kinds that Helm has to know before it sends anything, so their CRDs
// cannot be templates beside them.
func TestCRDsAreThereBeforeTheirClasses(t *testing.T) {
	const values = `
snapshots: {enabled: true}
snapshotController: {enabled: true, installCRDs: true}
volumeSnapshotClasses: [{name: s}]
`
	c, err := load(parse(t, values))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(c.CRDObjects()); n != 6 {
		t.Errorf("Helm installs %d CRDs first", n)
	}
	for name, text := range must(Render(parse(t, values), "Helm"))(t) {
		if name != "crds.yaml" && strings.Contains(text, "kind: CustomResourceDefinition") {
			t.Errorf("%s has a CRD", name)
		}
	}
}

func TestUpgradeThatWantsCRDsSaysWhatToDo(t *testing.T) {
	for _, c := range []struct {
		apis common.VersionSet
		want string
	}{
		{nil, "kubectl apply -f charts/csi-loop/charts/snapshot-crds/crds"},
		{common.VersionSet{"snapshot.storage.k8s.io/v1"}, ""},
	} {
		values := parse(t, "snapshotController: {enabled: true, installCRDs: true}")
		loaded := must(load(values))(t)
		known := common.DefaultCapabilities.Copy()
		known.APIVersions = append(known.APIVersions, c.apis...)
		upgrade := release()
		upgrade.IsInstall, upgrade.IsUpgrade = false, true
		all := must(commonutil.ToRenderValues(loaded, values, upgrade, known))(t)
		_, err := engine.Render(loaded, all)
		if got := err != nil; got != (c.want != "") || got && !strings.Contains(err.Error(), c.want) {
			t.Errorf("with %v: %v", c.apis, err)
		}
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
