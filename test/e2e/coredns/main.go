// Command coredns is CoreDNS with only the plugins that the cluster's DNS needs.
package main

import (
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"       // the addresses to listen on
	_ "github.com/coredns/coredns/plugin/cache"      // repeated questions
	_ "github.com/coredns/coredns/plugin/errors"     // failures in the log
	_ "github.com/coredns/coredns/plugin/hosts"      // names outside the cluster
	_ "github.com/coredns/coredns/plugin/kubernetes" // Services and pods
	_ "github.com/coredns/coredns/plugin/ready"      // readiness over HTTP
	_ "github.com/coredns/coredns/plugin/template"   // fixed answers
)

func main() { coremain.Run() }
