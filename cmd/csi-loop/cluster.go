package main

import (
	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
)

// clusterFlags say which cluster an administrator's command is about.
type clusterFlags struct{ kubeconfig, context string }

func (k *clusterFlags) register(fs *pflag.FlagSet) {
	fs.StringVar(&k.kubeconfig, "kubeconfig", "", "kubeconfig file (default: as kubectl, $KUBECONFIG or ~/.kube/config)")
	fs.StringVar(&k.context, "context", "", "context of the kubeconfig to use (default: its current one)")
}

func (k *clusterFlags) given() bool { return k.kubeconfig != "" || k.context != "" }

// config finds the cluster as kubectl does, but for one thing: the service account of
// the pod that it runs in is never taken. These commands are for people, and a pod that
// is allowed to delete volumes was not made for them.
func (k *clusterFlags) config() (*rest.Config, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = k.kubeconfig
	files, err := rules.Load()
	if err != nil {
		return nil, usagef("kubeconfig: %w", err)
	}
	cfg, err := clientcmd.NewDefaultClientConfig(*files, &clientcmd.ConfigOverrides{CurrentContext: k.context}).ClientConfig()
	switch {
	case clientcmd.IsEmptyConfig(err):
		return nil, usagef("no cluster: give --kubeconfig, or set KUBECONFIG, or have ~/.kube/config")
	case err != nil:
		return nil, usagef("kubeconfig: %w", err)
	}
	cfg.QPS, cfg.Burst = 50, 100
	return cfg, nil
}

func (k *clusterFlags) client() (kubeapi.Interface, error) {
	cfg, err := k.config()
	if err != nil {
		return nil, err
	}
	client, err := kubeapi.NewForConfig(cfg)
	return client, failed(err)
}
