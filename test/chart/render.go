// Package chart renders the Helm chart: for its tests, and for the generate command,
// which writes what is made from it.
package chart

import (
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"runtime"

	"helm.sh/helm/v4/pkg/chart/common"
	commonutil "helm.sh/helm/v4/pkg/chart/common/util"
	v2 "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	chartutil "helm.sh/helm/v4/pkg/chart/v2/util"
	"helm.sh/helm/v4/pkg/engine"
)

// Namespace is where the chart is installed to.
const Namespace = "csi-loop"

// Root is the repository.
func Root() string {
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		panic("BUG: built without paths")
	}
	return filepath.Join(filepath.Dir(file), "..", "..")
}

// Dir is the chart.
func Dir() string { return filepath.Join(Root(), "charts", "csi-loop") }

// load reads the chart, and leaves out what the values do not ask for.
func load(values map[string]any) (*v2.Chart, error) {
	c, err := loader.Load(Dir())
	if err != nil {
		return nil, err
	}
	return c, chartutil.ProcessDependencies(c, values)
}

// release is what a rendering is called.
func release() common.ReleaseOptions {
	return common.ReleaseOptions{Name: "csi-loop", Namespace: Namespace, Revision: 1, IsInstall: true}
}

// Render renders the chart with values over its own, as "helm install" does. The
// result is by the names of the templates, such as "node.yaml"; what Helm installs
// before them is "crds.yaml". service is what the
// objects say they are managed by.
func Render(values map[string]any, service string) (map[string]string, error) {
	c, err := load(values)
	if err != nil {
		return nil, err
	}
	all, err := commonutil.ToRenderValues(c, values, release(), common.DefaultCapabilities.Copy())
	if err != nil {
		return nil, err
	}
	r, ok := all["Release"].(map[string]any)
	if !ok {
		return nil, fmt.Errorf("the SDK has changed: Release is a %T", all["Release"])
	}
	r = maps.Clone(r)
	r["Service"] = service
	all["Release"] = r
	rendered, err := engine.Render(c, all)
	if err != nil {
		return nil, err
	}
	out := byName(rendered)
	for _, crd := range c.CRDObjects() {
		out["crds.yaml"] += "---\n" + string(crd.File.Data)
	}
	return out, nil
}

// byName takes the chart's name out of the templates'.
func byName(rendered map[string]string) map[string]string {
	out := map[string]string{}
	for name, text := range rendered {
		if path.Base(name)[0] != '_' {
			out[path.Base(name)] = text
		}
	}
	return out
}
